"""What people start: prediction, evaluation, cards, the pipeline, the command line."""
