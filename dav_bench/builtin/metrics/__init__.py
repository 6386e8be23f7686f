"""What samples are measured by: each metric is a function of the samples and of a context."""
