"""Studies: several runs, their costs and their comparison."""
