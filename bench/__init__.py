"""Benchmarks: what is timed (``shapes``), against whom (``peers``), how (``timing``), how sure
(``oracle``), and how the README's tables come from it (``report``); and the choice of the Triton
kernels' blocks (``tune``)."""
