"""One module a backend, one contract (see ``voco_kernels.attention.dispatch``); none imports another."""
