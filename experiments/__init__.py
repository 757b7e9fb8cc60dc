"""What a person runs: the command line, benchmarks, curves, plots and the workload."""
