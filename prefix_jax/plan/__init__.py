"""What a computation costs, known before it runs."""
