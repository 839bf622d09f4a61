"""Where runs are trained: each backend is a row of `registry.table("backends")`."""
