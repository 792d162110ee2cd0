"""`vispec generate` on tiny models saved to disk: real runs, and every error as one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import vispec
import vispec.cli.running
import vispec.compare.run
from tests.saved import PROMPT, expected, make_processor, save_all
from vispec.cli import main
from vispec.cli.loading import find_device
from vispec.cli.tree_view import ACCEPTED, BONUS, ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """See `tests.saved.save_all`."""
    root = tmp_path_factory.mktemp("models")
    save_all(root)
    return root


@pytest.fixture
def generate(folder, capsys, monkeypatch):
    """Runs `vispec generate` in the models' folder: exit code, stdout, stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: str, model: str = "llava", draft: str | None = "", prompt: str = PROMPT):
        argv = ["generate", "--model", model, "--prompt", prompt]
        argv += ["--max-new-tokens", "8", "--device", "cpu"]
        if draft is not None:
            argv += ["--draft", draft or f"{model}_draft"]
        code = main([*argv, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("pictures", [[], ["red.png"], ["red.png", "grey.png"]])
def test_answers_are_plain_generations(generate, folder, pictures):
    arguments = [part for picture in pictures for part in ("--image", picture)]
    code, out, _ = generate("--json", *arguments)
    assert code == 0
    report = json.loads(out)
    assert report["tokens"] == expected("llava", folder, pictures)
    assert report["new_tokens"] == len(report["tokens"])
    assert report["comparison"] is None and report["trees"] == []


def test_text_only_model(generate, folder):
    code, out, _ = generate("--json", model="llama")
    assert code == 0
    assert json.loads(out)["tokens"] == expected("llama", folder, [])


def test_text_streams_to_stdout(generate, folder):
    code, out, err = generate("--image", "red.png")
    words = [f"w{token}" for token in expected("llava", folder, ["red.png"])]
    assert code == 0
    assert out.splitlines()[0].split() == words
    assert "tau" in out and "tokens/s" in out
    assert "loading llava" in err


def test_without_chat_template_pictures_come_first(generate, folder, monkeypatch):
    processor = make_processor(chat=False)
    monkeypatch.setattr(
        "vispec.cli.loading.AutoProcessor",
        SimpleNamespace(from_pretrained=lambda name: processor),
    )
    tokens = [
        json.loads(generate("--json", "--image", "red.png", prompt=prompt)[1])["tokens"]
        for prompt in (PROMPT, f"<image> {PROMPT}")
    ]
    assert tokens[0] == tokens[1]
    code, _, err = generate("--image", "red.png", prompt="<image> <image> w4")
    assert code == 2 and "once for each picture, got 2 for 1" in err


def test_compare_prints_verdict_and_speeds(generate):
    code, out, _ = generate("--compare", "--image", "red.png")
    assert code == 0
    assert "identical: yes" in out.splitlines()
    assert "of model.generate: speed-up" in out


def test_compare_in_json(generate):
    code, out, _ = generate("--compare", "--json", model="llama")
    found = json.loads(out)["comparison"]
    assert code == 0
    assert found["verdict"] == "identical: yes" and found["speed_up"] > 0


def test_audit_passes_a_true_answer(generate):
    code, out, _ = generate("--audit", "--image", "red.png")
    assert code == 0
    assert "audit: passed, each of 8 tokens is the plain model's argmax" in out.splitlines()
    code, out, _ = generate("--audit", "--json", model="llama")
    report = json.loads(out)
    assert code == 0
    assert report["audit"] == {"passed": True, "tokens": report["new_tokens"], "tie_steps": 64, "departures": []}


def test_audit_fails_another_token(generate, monkeypatch):
    own = vispec.cli.running.fast_generate

    def other(model, draft, inputs, **options):
        result = own(model, draft, inputs, **options)
        result.sequences[0, -1] = 5
        return result

    monkeypatch.setattr(vispec.cli.running, "fast_generate", other)
    code, out, _ = generate("--audit", model="llama")
    assert code == 1
    assert "audit: failed, 1 of 8 tokens not the plain model's argmax" in out.splitlines()
    assert "token 7: 5 for " in out and out.rstrip().endswith("no tie")
    code, out, _ = generate("--audit", "--json", model="llama")
    assert code == 1 and json.loads(out)["audit"]["departures"][0]["token"] == 7


def test_guard_is_passed_on(generate, folder):
    code, out, _ = generate("--json", "--exact", "guard", "--compare", model="llama")
    report = json.loads(out)
    assert code == 0 and report["guarded"] == 0
    assert report["tokens"] == expected("llama", folder, [])
    code, _, err = generate("--exact", "guard", "--temperature", "1")
    assert code == 2 and 'exact must be "law"' in err


def test_another_answer_exits_with_one(generate, monkeypatch):
    own = vispec.compare.run.fast_generate

    def other(model, draft, inputs, **options):
        result = own(model, draft, inputs, **options)
        return SimpleNamespace(sequences=(result.sequences + 1) % 100, stats=result.stats)

    monkeypatch.setattr(vispec.compare.run, "fast_generate", other)
    code, out, _ = generate("--compare", model="llama")
    assert code == 1
    assert "identical: no" in out.splitlines()
    assert "first difference at token 0: plain" in out


def test_no_draft_decodes_plainly(generate, folder):
    code, out, _ = generate("--no-draft", "--json", model="llama", draft=None)
    report = json.loads(out)
    assert code == 0
    assert report["tokens"] == expected("llama", folder, []) and report["tau"] == 0


def test_sampling_repeats_with_its_seed(generate):
    sampled = [
        json.loads(generate("--json", "--temperature", "1.5", "--top-k", "0", "--seed", seed)[1])["tokens"]
        for seed in ("7", "7", "8")
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_show_tree_prints_every_round(generate):
    sizes = ("--depth", "1", "--width", "2", "--total-tokens", "5")
    code, out, _ = generate("--show-tree", *sizes)
    assert code == 0
    assert "round 1: " in out and "├──" in out
    code, out, _ = generate("--show-tree", "--json", *sizes)
    report = json.loads(out)
    assert len(report["trees"]) == report["rounds"]
    for tree in report["trees"]:
        states = [word["state"] for word in tree]
        assert states.count(ROOT) == 1 and states.count(BONUS) <= 1
        assert len(tree) - states.count(BONUS) == 5
    # Every round's accepted tokens and bonus, behind the prefill's own token, are the answer.
    words = [
        word["token"]
        for tree in report["trees"]
        for state in (ACCEPTED, BONUS)
        for word in tree
        if word["state"] == state
    ]
    assert report["tokens"][1:] == words


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", "nowhere.png"], "--image must be a file, got nowhere.png"),
        (["--image", "broken.png"], "--image must be a picture, got broken.png"),
        (["--device", "moon"], "--device must be auto, cpu, cuda or cuda:N, got moon"),
        (["--device", "meta"], "--device must be auto, cpu, cuda or cuda:N, got meta"),
        (["--device", "cuda:99"], "--device must be usable here, got cuda:99"),
        (["--temperature", "1", "--compare"], "--compare needs greedy answers"),
        (["--temperature", "1", "--audit"], "--audit needs greedy answers"),
        (["--temperature", "-1"], "temperature must be above 0"),
        (["--top-p", "0.5"], "--top-p: --temperature must be above 0"),
        (["--no-draft"], "--draft and --no-draft"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--max-new-tokens", "9999"], "512 positions"),
        (["--width", "99"], "tree: top_k must be in"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--model", "nowhere"], "--model nowhere: "),
        (["--model", "/nowhere/model"], "--model must be a folder or a hub id"),
        (["--model", "llava_draft"], "--model llava_draft: "),
        (["--draft", "nowhere"], "load_draft: nowhere must be a folder or a hub id"),
        (["--draft", "nobody/nothing"], "--draft nobody/nothing: "),
        (["--draft", "llama"], "load_draft: llama must hold the tensor"),
        (["--prompt", " "], "--prompt must not be empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_two(generate, arguments, message):
    code, out, err = generate(*arguments)
    assert code == 2
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("vispec: ") and message in last
    assert "Traceback" not in err


def test_pictures_for_a_text_only_model(generate):
    code, _, err = generate("--image", "red.png", model="llama")
    assert code == 2 and "needs a vision-language model" in err


def test_a_draft_is_asked_for(generate):
    code, _, err = generate(draft=None)
    assert code == 2 and "--draft must be a folder or a hub id, got nothing" in err


def test_a_truncated_model_is_one_line(generate, folder, tmp_path):
    for file in (folder / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, out, err = generate(model=str(tmp_path), draft="llama_draft")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"vispec: --model {tmp_path}: ")


def test_a_gpu_without_kernels_falls_back_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("vispec._native.build_info", lambda: {"native": True, "cuda": False})
    assert find_device("auto").type == "cpu"
    assert "VISPEC_CUDA=ON" in capsys.readouterr().err
    monkeypatch.setattr("vispec._native.build_info", lambda: {"native": True, "cuda": True})
    assert find_device("auto").type == "cuda"


def test_traceback_on_demand(generate):
    code, _, err = generate("--image", "nowhere.png", "--traceback")
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize(
    "error, code, message",
    [
        (KeyboardInterrupt(), 130, "vispec: interrupted"),
        (FloatingPointError("logits are not finite"), 1, "FloatingPointError: logits are not"),
    ],
)
def test_other_ends(generate, monkeypatch, error, code, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("vispec.cli.running.fast_generate", fail)
    found, _, err = generate(model="llama")
    assert found == code
    assert message in err and "Traceback" not in err


def test_unknown_command_and_version(capsys):
    assert main(["juggle"]) == 2
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"vispec {vispec.__version__}\n")


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "vispec", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, f"vispec {vispec.__version__}")
