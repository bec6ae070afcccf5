"""From predictions to table rows: metrics, calibration, detection, identification, robustness, embeddings."""
