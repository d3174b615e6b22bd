"""How close generated images come to real ones.

features.py             images -> features (EfficientNet-Lite0; Inception where its weights are at hand)
frechet.py              Frechet distance between Gaussians fitted to features
precision_recall.py     precision and recall by nearest neighbours
sliced_wasserstein.py   sliced Wasserstein distance between patches, level by level
real.py                 statistics of the real images, kept on disk
evaluation.py           all of them, in one pass over the generated images
"""
