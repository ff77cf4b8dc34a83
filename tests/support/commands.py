def train(work_dir, *arguments):
    """Run tools/train.py; return its mAP50 and what it printed."""
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments, "--work-dir", str(work_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(re.search(r"^mAP50 ([\d.]+)", done.stdout, re.MULTILINE)[1]), done.stdout
