"""What tests of several processes note in each of them."""

import json
import zlib

from accelerate.state import PartialState


def watched(training_inputs):
    """What makes training inputs of images, noting these in a file of the process."""

    def inputs(args, batch, network, draws):
        numbers = [zlib.crc32(image.numpy().tobytes()) for image in batch["pixel_values"]]
        with open(f"{args.output_dir}-process-{PartialState().process_index}.jsonl", "a") as file:
            file.write(json.dumps(numbers) + "\n")
        return training_inputs(args, batch, network, draws)

    return inputs
