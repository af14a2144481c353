"""One module a backend, one contract (see ``voco_kernels.dispatch``); none imports another."""
