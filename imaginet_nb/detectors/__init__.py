"""Anything with `score`: the protocol, prior methods, custom detectors, linear probes."""
