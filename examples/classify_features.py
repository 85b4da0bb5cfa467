"""Features of a checkpoint for scikit-learn: the network is frozen, and only what stands on its features learns.

ddae quickstart
python examples/classify_features.py --checkpoint runs/quickstart/checkpoint --data runs/quickstart/digits
"""

import argparse

import numpy as np
import torch
from datasets import load_dataset
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ddae_hf import DDAEImageProcessor, DDAEModel


@torch.no_grad()
def features(model, processor, images, batch_size=256):
    """Return the pooled hidden states of PIL images at the model's layer and noise level, float32 (N, C)."""
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    return np.concatenate([model(**processor(batch, return_tensors="pt")).pooler_output.numpy() for batch in batches])


def main():
    """Fit two classifiers on features of the training images, and test them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/quickstart/checkpoint")
    parser.add_argument("--data", default="runs/quickstart/digits", help="with the columns `image` and `label`")
    arguments = parser.parse_args()

    # The network sees images with a little noise: `sigma` is its deviation, for images in [-1, 1]. `ddae sweep` finds
    # which layer and which level are best. A model that is not told takes its defaults, as it does for the layer here.
    model = DDAEModel.from_pretrained(arguments.checkpoint, sigma=0.1)
    processor = DDAEImageProcessor.from_pretrained(arguments.checkpoint)
    data = load_dataset(arguments.data)
    train = features(model, processor, data["train"]["image"][:])
    test = features(model, processor, data["test"]["image"][:])
    print(f"{train.shape[1]} features of {len(train)} + {len(test)} images, at {model.config.layer}")

    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier(5))
    for name, classifier in (("logistic regression", linear), ("5 nearest neighbours", neighbours)):
        classifier.fit(train, data["train"]["label"][:])
        print(f"{name}: {classifier.score(test, data['test']['label'][:]):.1%} of the test images")


if __name__ == "__main__":
    main()
