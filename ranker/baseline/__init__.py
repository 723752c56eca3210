"""The `baseline` arm: gradient boosting over counts, context and similarity of content to history."""
