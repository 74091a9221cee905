"""Many runs with one purpose: grids and searches, ablations, sampler curves, the demos."""
