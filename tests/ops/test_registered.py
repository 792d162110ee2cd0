"""The ops inside a compiled region: no break, the same answers, and nothing else for eager calls."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops import CASES
from vispec import ops

OPS = sorted(name.removesuffix("_reference") for name in ops.__all__ if name.endswith("_reference"))
COMPILERS = ("eager", "aot_eager")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recording(compiler: str, graphs: list):
    """A compiler that keeps the graphs it was given."""
    chosen = torch._dynamo.lookup_backend(compiler)

    def compile_and_keep(graph, inputs):
        graphs.append(graph)
        return chosen(graph, inputs)

    return compile_and_keep


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", OPS)
def test_a_compiled_region_holds_the_op(name, compiler):
    """Every case of the op benchmark: one graph, one operator in it, and the right answer in every output."""
    cases = [case for case in CASES if case.op == name]
    assert cases, f"{name} has no case in benchmarks/ops"
    for case in cases:
        torch._dynamo.reset()
        graphs = []
        problem = case.problem("cpu", small=True)
        eager = problem.run
        problem.run = torch.compile(lambda eager=eager: eager(), fullgraph=True, backend=recording(compiler, graphs))
        assert problem.check() <= problem.error_bound
        assert problem.check() <= problem.error_bound
        (graph,) = graphs
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert called.count(f"vispec.{name}") + called.count(f"vispec.{name}.default") == 1, called


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_op_reads_what_the_region_computed_and_the_region_what_the_op_wrote(compiler):
    """Inputs made in the region, an output that is a view, and a result that depends on both, at two sizes."""

    def region(logits, buffer, scores):
        K = scores.shape[1]
        chosen = {name: torch.zeros(1, K, dtype=torch.int64) for name in ("next_frontier", "next_rows", "next_tokens")}
        tokens, parents = buffer[:1], buffer[1:]
        candidate_scores = torch.full(tokens.shape, -1.0)
        ops.grow_level(
            logits.float() * 2,
            scores - 1,
            torch.full(scores.shape, -1),
            candidate_tokens=tokens,
            candidate_scores=candidate_scores,
            candidate_parents=parents,
            offset=1,
            next_scores=torch.zeros(1, K),
            arrivals=torch.zeros(1, dtype=torch.int32),
            **chosen,
        )
        return chosen["next_tokens"] + 1, candidate_scores.exp()

    compiled = torch.compile(region, fullgraph=True, backend=compiler)
    for V in (50, 70):
        logits, scores = torch.randn(1, 3, V, dtype=torch.bfloat16), torch.rand(1, 3)
        buffers = [torch.full((2, 12), -5) for _ in range(2)]
        expected, found = region(logits, buffers[0], scores), compiled(logits, buffers[1], scores)
        assert torch.equal(buffers[0], buffers[1]) and not (buffers[0][:, 1:10] == -5).any()
        for value, want in zip(found, expected, strict=True):
            torch.testing.assert_close(value, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPS)
def test_the_schema_says_what_is_written(name, monkeypatch):
    """A write that the schema does not tell would be dropped or moved by a compiler."""
    for case in (case for case in CASES if case.op == name):
        calls = []
        problem = case.problem("cpu", small=True)
        problem.prepare()
        with monkeypatch.context() as patch:
            patch.setattr(ops, name, lambda *tensors, calls=calls, **named: calls.append((tensors, named)))
            problem.run()
        ((tensors, named),) = calls
        operator = getattr(torch.ops.vispec, name).default
        # Named tuples cross as lists, empty for None.
        for tuple_name in {"sampling", "tail", "rows", "gather"} & {
            argument.name for argument in operator._schema.arguments
        }:
            if len(tensors) <= [argument.name for argument in operator._schema.arguments].index(tuple_name):
                named[tuple_name] = list(named.get(tuple_name) or ())
        torch.library.opcheck(operator, tensors, named, test_utils=("test_schema", "test_faketensor"))


def test_a_wrong_argument_is_still_refused_by_name():
    compiled = torch.compile(ops.commit, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="commit: counts must be int64"):
        path = torch.zeros(1, 2, dtype=torch.int64)
        compiled([torch.zeros(1, 1, 4, 8)], path, path, torch.zeros(1), torch.zeros(1))
