"""Image losses that read taps or train projectors, each built on a pure function of `lit_distill.losses`."""
