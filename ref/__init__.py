"""Perceptual entropy for flow-based RLHF: a reference implementation of arXiv 2605.12112.

The paper, from the ground up; each module stands on those above it:

    schedule      time grids, and the theta-free part of the policy: mean and std of three kernels
    policy        the Gaussian step, its log-density, rollouts
    entropy       closed forms of policy and path entropy; KL between policies
    perceptual    log p_perc, H_perc, calibration, the kernel variant, the law R = -a exp(H) + b
    metrics       diversity, Norm.Avg, Overall
    methods       what each method adds to the reward or the loss: PEC, PCVAE and what they are compared with
    constraint    a diversity in place of a weight: lambda finds itself
    settings      what decides a run
    sampling      a round of samples, and what networks say of them
    state         what training carries from one iteration to the next
    grpo          advantages, ratio, update; train(), a generator that yields its state
    figures       the paper's figures

Four wings:

    worlds/       where everything is known, or seen at a glance: mixtures, two modes, letters
    models/       SD3 and FLUX: diffusers' parts behind a few names
    scoring/      phi and R: encoders, rewards
    scale/        many GPUs, memory, being killed

And the commands, `python -m ref` and `python -m ref.NAME`:

    train         one run        runs         what a run is, in options and in words
    presets       what is trained on what, towards what
    evaluate      one row        compare      many runs, one table
    benchmark/    what it costs  options      a command line from a declaration
"""
