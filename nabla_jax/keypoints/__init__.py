"""Training a keypoint head on a frozen DINOv2, from any dataset folder with annotated parts."""
