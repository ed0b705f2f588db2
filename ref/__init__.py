"""Perceptual entropy for flow-based RLHF: a reference implementation of arXiv 2605.12112."""
