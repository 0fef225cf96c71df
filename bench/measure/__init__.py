"""One timed picture: the clock, the workload, the GPU and the host it runs on."""
