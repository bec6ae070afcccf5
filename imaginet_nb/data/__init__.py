"""From files to tensors: manifests, images, augmentation, corruptions, test sets, the sandbox."""
