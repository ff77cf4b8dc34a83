"""What one framework needs beyond a registry. Importing this package imports no framework."""
