# %% [markdown]
# # Does it help? An ablation
#
# `detloss ablate` from Python: losses x seeds, the stock losses always among them. What has finished is kept in the
# folder, so that the same lines go on after a kill, and more losses and seeds can be added. Two seeds of one epoch
# on a quarter of the images are an example only: a verdict takes three seeds, and a budget at which the detector has
# learnt something.

# %%
from detloss_plugins.ablation import Study, plan

losses = {
    "vfl": {"cls": {"type": "VarifocalLoss", "loss_weight": 4.0}},
}
runs = plan(losses, ["yolov8n.yaml"], ["digits"], seeds=2, epochs=1, args={"fraction": 0.25})
study = Study("runs/ablation")
study.add(runs)
study.train(runs, jobs=1)

# %% [markdown]
# The differences are paired: of the same seed with the stock losses. What lies below the spread from seed to seed means
# nothing.

# %%
from detloss_plugins.ablation.compare import table
from detloss_plugins.ablation.report import write_report

results = study.results()
for row in table(results["runs"]):
    print(row.label, row.spreads["AP50"], row.differences.get("AP50"))
write_report([results], "runs/ablation")
