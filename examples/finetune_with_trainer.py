"""Fine-tune a checkpoint as a classifier with transformers' Trainer, like any of its image classifiers.

ddae quickstart
python examples/finetune_with_trainer.py --checkpoint runs/quickstart/checkpoint --data runs/quickstart/digits
"""

import argparse

import torch
from datasets import load_dataset
from transformers import Trainer, TrainingArguments

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor


def accuracy(prediction):
    """Return the share of images whose largest logit is that of their class."""
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main():
    """Train for three epochs, test, and save a folder that `from_pretrained` opens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/quickstart/checkpoint")
    parser.add_argument("--data", default="runs/quickstart/digits", help="with the columns `image` and `label`")
    arguments = parser.parse_args()

    data = load_dataset(arguments.data)
    names = data["train"].features["label"].names
    # The checkpoint is a generator: transformers reports that the classifier on top of it is new, and must be trained.
    # After `model.freeze_denoiser()` only that classifier would learn, as a linear probe.
    model = DDAEForImageClassification.from_pretrained(arguments.checkpoint, id2label=dict(enumerate(names)))
    processor = DDAEImageProcessor.from_pretrained(arguments.checkpoint)

    def prepare(rows):
        return {**processor(rows["image"], return_tensors="pt"), "labels": rows["label"]}

    data = data.with_transform(prepare)
    trainer = Trainer(
        model,
        TrainingArguments(
            "runs/finetuned_with_trainer",
            num_train_epochs=3,
            per_device_train_batch_size=32,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,  # the model takes no `image`, but `prepare` does
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.save_model()
    print(f"{trainer.evaluate()['eval_accuracy']:.1%} of the test images are recognised.")
    print("The classifier is in runs/finetuned_with_trainer.")


if __name__ == "__main__":
    main()
