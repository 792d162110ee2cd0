"""Trains and measures the drafts that ViSpec is compared with: the same answers, the same steps, several seeds.

Every run is a folder `NAME SEED` in `--out`; one that holds its figures is not run again. In the end the command is
printed that makes the table of docs/training.md out of them.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What each changes in the settings of a ViSpec draft; None: there is nothing to train, and `eval` knows the name.
DRAFTS = {
    "ViSpec": [],
    "EAGLE-2": ["--num-queries", "0"],
    "EAGLE-2 for as long": ["--num-queries", "0"],
    "text-only EAGLE": ["--num-queries", "0", "--no-picture-rows"],
    "no global feature": ["--no-global-feature"],
    "no self-rollout": ["--mtp-steps", "0"],
    "Medusa": ["--kind", "medusa", "--no-balanced", "--mtp-steps", "3"],
    "prompt lookup": None,
    "oracle": None,
    "5 queries": ["--num-queries", "5"],
    "17 queries": ["--num-queries", "17"],
    "65 queries": ["--num-queries", "65"],
}

# A step of a draft that reads every picture row takes so many times as long, the target's part left out: in as much
# time as the others have it makes fewer.
FEWER_STEPS = {"EAGLE-2 for as long": 1.8}


def command(name: str, *words: str) -> None:
    """One `vispec train` command, which must succeed."""
    subprocess.run([sys.executable, "-m", "vispec.train", name, *words], check=True)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="demo:RUN")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--held-out", required=True, help="JSONL of `write_requests.py`")
    parser.add_argument("--image-root", required=True)
    parser.add_argument("--limit", default="32", help="held-out requests")
    parser.add_argument("--max-new-tokens", default="128", help="of the held-out answers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", default="160", help="of 16 samples")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--drafts", nargs="+", choices=DRAFTS, default=list(DRAFTS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = ["--model", options.model, "--dtype", options.dtype]
    runs = []
    for seed in options.seeds:
        for name in options.drafts:
            changes = DRAFTS[name]
            if changes is None and seed != options.seeds[0]:
                continue
            folder = options.out / f"{name} {seed}"
            runs.append(f"'{name}={folder}'")
            if (folder / "figures.json").exists():
                continue
            if changes is not None and not (folder / "model.safetensors").exists():
                steps = str(round(int(options.steps) / FEWER_STEPS.get(name, 1)))
                shared = ["--config", str(HERE / "draft.yaml"), "--max-steps", steps, "--seed", seed]
                # One pass of self-rollout from the first step on, as published: a short run has no time for four.
                shared += ["--mtp-steps", "1", "--mtp-warmup", "0", "--warmup-epochs", "0.25"]
                places = ["--out", str(folder), "--feature-cache", str(options.out / "features")]
                started = (folder / "checkpoints").exists()
                resumed = ["--resume"] if started else []
                if not started:
                    # The log of a run that was stopped before its first checkpoint, which `fit` would not write over.
                    shutil.rmtree(folder, ignore_errors=True)
                command("fit", *model, "--data", *options.data, *shared, *changes, *places, *resumed)
            folder.mkdir(exist_ok=True)
            asked = ["--source", options.held_out, "--image-root", options.image_root, "--extension", ""]
            asked += ["--limit", options.limit, "--max-repeated", "0.3", "--max-new-tokens", options.max_new_tokens]
            draft = name.replace(" ", "-") if changes is None else str(folder)
            command("eval", *model, *asked, "--draft", draft, "--out", str(folder / "figures.json"))
    print("python -m benchmarks.training runs", *runs)


if __name__ == "__main__":
    main()
