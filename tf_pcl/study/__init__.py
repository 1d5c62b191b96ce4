"""Studies: several runs, planned by what they cost, and compared."""
