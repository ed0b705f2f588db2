"""Worlds where everything is known, or seen at a glance.

mixture          Gaussian mixtures with the exact velocity; the replicator flow
two_modes        two modes under PEC and GRPO, exactly, at finite group size
many_modes       many modes likewise: PEC is sparsemax, the kernel softmax
letters          SD3's own classes on coloured capitals of 360 free typefaces, judged by RapidOCR
figures          pictures of these worlds
"""
