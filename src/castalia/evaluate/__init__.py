"""Evaluation: tasks, texts and token data, and two models on the same items (docs/evaluate.md)."""
