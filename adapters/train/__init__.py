"""Training: config → data → recipe → evaluate → hand over. Runs with no server; `python -m adapters.train run FILE`."""
