"""Cost of a computation, determined before it runs."""
