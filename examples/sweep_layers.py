"""Which layer and which noise level have the best features: `ddae sweep` from Python, with its results at hand.

ddae quickstart
python examples/sweep_layers.py --checkpoint runs/quickstart/checkpoint --data runs/quickstart/digits
"""

import argparse

from ddae_hf.experiments import Images, sweep


def main():
    """Sweep the decoder's layers at three noise levels, and look at every pair and at the best one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/quickstart/checkpoint")
    parser.add_argument("--data", default="runs/quickstart/digits", help="a folder or a data set of the Hub")
    arguments = parser.parse_args()

    images = Images.open(arguments.data)
    result = sweep(arguments.checkpoint, images, layers=["decoder"], sigmas=[0.05, 0.1, 0.3], num_noise_seeds=1)
    print(result.table())

    # The pair was chosen on held-out training images: `pairs` has what each of them reached there.
    print("\nThe best layer at every noise level, on held-out training images:")
    for sigma in sorted({pair.sigma for pair in result.pairs}):
        best = max((pair for pair in result.pairs if pair.sigma == sigma), key=lambda pair: pair.validation_accuracy)
        print(f"  sigma {sigma:<5g} {best.layer:<24} {best.validation_accuracy:.1%}")

    # The folder has the heat map, every figure and the best pair as a classifier, which `from_pretrained` opens.
    result.save("runs/sweep_layers")
    print(f"\n{result.best.layer} at sigma {result.best.sigma:g} is the classifier in runs/sweep_layers.")

    image = images["test"].pil([0])
    logits = result.classifier(**result.processor(image, return_tensors="pt")).logits
    print(f"It takes the first test image for a {result.classifier.config.id2label[logits.argmax().item()]}.")


if __name__ == "__main__":
    main()
