"""Who moves keys and values between compact entries and a cache: one module a way, one contract.

``missing()`` says why a loader can't run on this machine, ``unsupported(move)`` why it can't make this
move (both lists of reasons, empty where it can), ``run(move)`` makes it, on the current stream.
"""
