"""Text to tokens on disk to batches.

    read ──> tokenizer ──> prepare ──> store (.bin, .idx)
                                         │ order, sample
    config ──> plan: step -> StepSpec ──> loader: StepSpec -> Batch

`corpora` has text to try things with. The loader alone needs torch.
"""
