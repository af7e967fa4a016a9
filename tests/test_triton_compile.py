"""What the Triton compiler makes of the kernels, for GPUs that are not here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import triton_table
from bench.lib.assembly import AMDGCN, SASS, hot_loop, hot_spills
from bench.lib.gpus import GPUS
from bench.lib.ttir import marked_lines
from bench.triton_table import (
    Compiled,
    cell,
    fingerprint,
    occupancy,
    problems,
    sources,
)

ROOT = Path(__file__).parents[1]
ARCHS = [x.arch for x in GPUS]
GOOD = Compiled("a kernel", "sm_90", 8, 168, 20, 12, 96 * 1024, "HGMMA", 12, 600, 8, True)


def run(*arguments, cache):
    """What a fresh process prints, that has no interpreter and no kernels compiled before."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout, done.stderr
    return [Compiled(**x) for x in json.loads(done.stdout)]


# --- the rules


def test_a_good_kernel_breaks_no_rule():
    assert problems(GOOD) == []
    no_products = replace(
        GOOD, products=0, wide_loads=0, needs_products=False, spills=0, loop_spills=0
    )
    assert problems(no_products) == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"loop_spills": 30}, "30 accesses to spilled registers in the loop"),
        ({"products": 0, "loop_spills": 3}, "3 accesses to spilled registers that"),
        ({"shared": 228 * 1024}, "233472 bytes of shared memory, where 232448 are allowed"),
        ({"products": 0}, "no tensor-core instruction"),
        ({"wide_loads": 0}, "no global load of 16 bytes"),
    ],
)
def test_what_is_wrong_is_named(change, said):
    assert said in "; ".join(problems(replace(GOOD, **change)))


def test_occupancy_by_hand():
    assert occupancy(GOOD) == 1 * 8 / 64  # 168 * 32 * 8 registers: 1 block of 65536
    assert occupancy(replace(GOOD, registers=128)) == 2 * 8 / 64
    assert occupancy(replace(GOOD, registers=33, shared=0)) == 6 * 8 / 64  # 40 registers
    assert occupancy(replace(GOOD, registers=16, shared=113 * 1024)) == 2 * 8 / 64
    assert occupancy(replace(GOOD, registers=16, shared=114 * 1024)) == 1 * 8 / 64
    on_amd = replace(GOOD, arch="gfx942", num_warps=4, registers=256, shared=32 * 1024)
    assert occupancy(on_amd) == 2 * 4 / 32


# --- reading assembly

SASS_TEXT = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/              @P1 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R7], desc[UR4][R2.64] ;
        /*0040*/              @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/             @UP0 BRA.U UP0, `(.L_x_2) ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   FADD R1, R1, R2 ;
        /*00a0*/               @P2 BRA `(.L_x_3) ;
.L_x_9:
        /*00b0*/                   EXIT ;
"""

AMD_TEXT = """
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; %loop
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
\tscratch_store_dword off, v1, s32
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\ts_endpgm
"""


def test_the_hot_loop_is_the_innermost_with_products():
    loop = hot_loop(SASS_TEXT, SASS)
    assert [x.split(".")[0] for x in loop] == ["LDGSTS", "HGMMA", "FADD", "BRA"]
    loop = hot_loop(AMD_TEXT, AMDGCN)
    expected = ["global_load_dwordx4", "v_mfma_f32_32x32x8_bf16", "scratch_store_dword"]
    assert loop == [*expected, "s_cbranch_scc1"]
    assert len(hot_loop(SASS_TEXT.replace("HGMMA", "FFMA"), SASS)) == 12


def test_what_runs_only_for_numbers_that_are_not_finite_is_not_hot():
    cold = SASS_TEXT.replace(
        "        /*0050*/", '        //## File "/a/exact.py", line 3\n        /*0050*/'
    )
    assert (
        "exact.py" in cold and len(hot_loop(cold, SASS, "exact.py")) == 12
    )  # no loop with products
    assert hot_loop(cold, SASS) == hot_loop(SASS_TEXT, SASS)
    spilled = SASS_TEXT.replace("LDG.E.128.CONSTANT R4", "LDL R4")  # within the outer loop
    assert hot_spills(spilled, SASS, "exact.py") == 2
    assert hot_spills(spilled.replace("/*0050*/", "exact.py\n /*0050*/"), SASS, "exact.py") == 0


def test_products_are_wanted_unless_they_are_of_exact_float32():
    dot = "%7 = tt.dot %4, %5, %6{} : tensor<64x64x{}> * tensor<64x64x{}> -> tensor<64x64xf32>"
    assert triton_table.wants_products(dot.format("", "bf16", "bf16"))
    assert not triton_table.wants_products(dot.format("", "f32", "f32"))
    assert triton_table.wants_products(dot.format(", inputPrecision = tf32x3", "f32", "f32"))
    assert not triton_table.wants_products("%1 = tt.load %0")


def test_the_page_has_a_row_for_each_kernel():
    shown = replace(GOOD, name="x bfloat16 64 blocks 64x64 w4 s2", spills=0, loop_spills=0)
    found = [
        shown,
        replace(shown, arch="sm_80", spills=3, loop_spills=1),
        replace(GOOD, name="y static"),
    ]
    table = triton_table.page_table(found)
    assert "168 (3 spills, 1 in the loop), 96" in table
    assert cell(found[0]) == "168, 96, 12 %, 2.0 %"
    assert table.count("\n") == 2


# --- whether what is written is whole and current


def given(function, **changes):
    kernel, options = SimpleNamespace(fn=function), {"num_warps": 4}
    case = {"signature": {"x": "i32"}, "constexprs": {}, "aligned": (), "options": options}
    return SimpleNamespace(**({"kernel": kernel} | case | changes))


def test_a_fingerprint_is_that_of_the_code_and_of_what_the_compiler_is_given():
    def inner(x):
        return x + 1

    before = fingerprint(given(inner))
    assert before == fingerprint(given(inner))
    for change in ({"options": {"num_warps": 8}}, {"constexprs": {"x": 1}}, {"aligned": ("x",)}):
        assert fingerprint(given(inner, **change)) != before

    def inner(x):
        """A docstring."""
        return x + 1  # a comment

    assert fingerprint(given(inner)) == before

    def inner(x):
        return x + 2

    assert fingerprint(given(inner)) != before


CODE = """\
module {
  tt.func @kernel(%arg0: i32) {
    %0 = arith.addi %arg0, %arg0 : i32
    tt.return
  }
}"""
LOCATED = """\
#loc = loc("/a/forward.py":1:0)
#loc2 = loc("/a/exact.py":7:0)
module {
  tt.func @kernel(%x: i32 loc("x"(#loc))) {
    %y = arith.addi %x, %x : i32 loc(#loc3)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
#loc1 = loc(unknown)
#loc3 = loc("y"(#loc4))
#loc4 = loc(callsite(#loc2 at #loc))"""


def test_lines_are_marked_that_come_from_a_file():
    marked = marked_lines(CODE, LOCATED, "exact.py")
    assert [line for line, _ in marked] == CODE.splitlines()
    assert [line.split()[0] for line, is_cold in marked if is_cold] == ["%0"]
    elsewhere = LOCATED.replace(":7:0", ":9:2").replace("/a/forward.py", "/b/backward.py")
    assert marked_lines(CODE, elsewhere, "exact.py") == marked
    assert marked_lines(CODE, LOCATED.replace("exact", "inexact"), "exact.py") != marked


def test_what_is_compiled_to_the_same_is_not_compiled_again(monkeypatch):
    known, case = replace(GOOD, ttir="same"), given(test_occupancy_by_hand)
    case.name = "a new name"
    monkeypatch.setattr(triton_table, "_cases_of_process", lambda arch: [case])
    monkeypatch.setattr(triton_table, "_recorded_of_process", lambda: [known])
    monkeypatch.setattr(triton_table, "compile_case", lambda *args: "compiled")
    monkeypatch.setattr(triton_table, "digest", lambda *args: "same")
    kept = triton_table.compile_number("sm_90", 0, keeps=True)
    assert kept == replace(known, name="a new name", fingerprint=fingerprint(case))
    assert triton_table.compile_number("sm_90", 0, keeps=False) == "compiled"
    monkeypatch.setattr(triton_table, "digest", lambda *args: "other")
    assert triton_table.compile_number("sm_90", 0, keeps=True) == "compiled"


def test_the_sources_of_a_kernel_are_those_of_all_that_it_calls():
    from sparse_attn.triton import backward, forward

    found = sources(forward._forward_kernel.fn)
    for name in ("_forward_kernel", "_step", "tile_of_list", "listed_keys", "LOG2E = 1.44"):
        assert name in found
    assert "def _keys_step" not in found
    assert "def _keys_step" in sources(backward._backward_keys_kernel.fn)


def test_the_table_is_whole_and_current_and_every_kernel_is_as_it_should_be():
    """Else the message names the command that compiles what is missing."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.triton_table", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_table_is_of_one_compiler():
    assert len({x.triton for x in triton_table.recorded()}) == 1


def test_what_is_missing_is_named(monkeypatch):
    found = [replace(GOOD, name=name, fingerprint="new") for name in "abc"]
    monkeypatch.setattr(triton_table, "recorded", lambda: found)
    cases = {"sm_90": list(found)}
    monkeypatch.setattr(triton_table, "kernel_cases", lambda arch: cases.get(arch, []))
    monkeypatch.setattr(triton_table, "fingerprint", lambda case: "new")
    assert triton_table.missing() == []
    triton_table.check()
    found[0] = replace(found[0], loop_spills=30)
    with pytest.raises(SystemExit, match="sm_90 a: 30 accesses to spilled registers"):
        triton_table.check()
    found[:2] = [replace(found[0], fingerprint="old"), replace(GOOD, name="gone")]
    expected = ["sm_90 a", "sm_90 b", "sm_90 gone (no longer a case)"]
    assert triton_table.missing() == expected
    with pytest.raises(SystemExit, match=r"(?s)lacks 3 kernels.* run python -m bench.triton_table"):
        triton_table.check()


# --- compiling


def test_a_kernel_is_read_as_what_it_is(tmp_path):
    pytest.importorskip("triton")
    found = run("tests.compile_attention", cache=tmp_path)
    by_name = {(x.name, x.arch): x for x in found}
    families = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"}
    for arch, family in families.items():
        good = by_name["good", arch]
        assert problems(good) == [], arch
        assert good.family.startswith(family) and 0 < good.share < 0.5 and 0 < occupancy(good) <= 1
    (why,) = problems(by_name["spilling", "sm_80"])
    assert "spilled registers" in why
    (why,) = problems(by_name["unaligned", "sm_80"])
    assert "16 bytes" in why
    codes = {x.ttir for x in found}
    assert len(codes) == len(found) and "" not in codes  # of the target and the options too
    exact = by_name["exact float32", "sm_80"]
    assert not exact.needs_products and exact.family == "-" and not problems(exact)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_kernels_compile_well(arch, tmp_path):
    found = run("bench.triton_table", "--json", "--quick", "--arch", arch, cache=tmp_path)
    assert all(x.name.startswith(y) for x, y in zip(found, triton_table.QUICK, strict=True))
    assert {x.name: why for x in found if (why := problems(x))} == {}
    family = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"}[arch]
    assert all(x.family.startswith(family) for x in found if " blocks " in x.name)
