"""Building blocks of methods: layers, losses, diffusion, denoisers and the sampler. They compute on tensors, not on files."""
