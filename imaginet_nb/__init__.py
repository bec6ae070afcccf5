"""Detection and identification of synthetic images, from data set to tables.

Importing this package switches off what its libraries would send on their own: usage statistics and checks for newer
versions. It comes before any of them is imported, and processes that are started later inherit it.
"""
import os

__version__ = "0.2.0"

os.environ |= {
    "ORT_DISABLE_TELEMETRY": "1", # ONNX Runtime, which starts to collect when it is imported
    "HF_HUB_DISABLE_TELEMETRY": "1", # huggingface_hub, and timm and open_clip through it
    "DO_NOT_TRACK": "1", # whatever follows this convention
    "RAY_USAGE_STATS_ENABLED": "0", # Ray, where somebody runs Snakemake or training with it
    "YARN_ENABLE_TELEMETRY": "0", # JupyterLab's builder of extensions
}
