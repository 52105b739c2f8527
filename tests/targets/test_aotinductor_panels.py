"""The C++ that multiplies integers in packages of AOTInductor: bodies give what the plain one gives, wide vectors stay in theirs."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from calque.targets._aotinductor_products import SOURCE

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the bodies are x86's")

# Small numbers of x are multiples of 1/64 and scales powers of two: where nothing is rounded every body's sum is exact.
MAIN = r"""
#include <cstdio>
#include <cstdlib>
using namespace calque;
int main() {
  std::printf("[");
  for (int64_t bits : {4, 8}) for (int64_t in : {32, 96}) for (int64_t outputs : {8, 16, 20, 45}) for (int zeros : {0, 1})
  for (int64_t rows : {1, 2, 3, 4, 13, 31}) for (int biased : {0, 1}) {
    const int64_t block = bits == 4 ? 32 : in, blocks = in / block, groups = bits == 4 ? blocks : 1, panels = (outputs + 7) / 8;
    std::vector<float> x(rows * in), scale(panels * groups * 8), bias(outputs), steps(rows * blocks);
    std::vector<uint8_t> q(panels * in * bits);
    std::vector<int8_t> zero(panels * groups * 8), rounded(rows * in);
    std::vector<int32_t> sums(rows * blocks);
    for (float& value : x) value = (rand() % 129 - 64) / 64.0f;
    for (float& value : scale) value = 1.0f / (1 << rand() % 8);
    for (float& value : bias) value = rand() % 9;
    for (uint8_t& value : q) value = rand();
    for (int8_t& value : zero) value = rand() % 15 - 7;
    auto multiplied = [&](PanelFunction some, decltype(&round_row) round, bool rounds) {
      std::vector<float> out(rows * outputs, NAN);
      Product p{};
      p.x = x.data(), p.q = q.data(), p.scale = scale.data(), p.out = out.data();
      p.zero = zeros ? zero.data() : nullptr, p.bias = biased ? bias.data() : nullptr;
      p.rows = rows, p.in = in, p.outputs = outputs, p.bits = bits, p.block = block, p.blocks = blocks, p.groups = groups;
      for (int64_t row = 0; rounds && row < rows; ++row)
        round(&x[row * in], blocks, block, &rounded[row * in], &steps[row * blocks], &sums[row * blocks]);
      if (rounds) p.rounded = rounded.data(), p.steps = steps.data(), p.sums = sums.data();
      for (int64_t panel = 0; panel < panels; panel += 2) some(p, panel, panel + 2 < panels ? panel + 2 : panels);
      return out;
    };
    auto apart = [&](const std::vector<float>& one, const std::vector<float>& other) {
      double most = 0, largest = 1e-9;
      for (size_t at = 0; at < one.size(); ++at) {
        const double far = std::fabs(one[at] - other[at]);
        most = far <= most ? most : far;  // which NaN is not
        largest = std::fmax(largest, std::fabs(other[at]));
      }
      return most / largest;
    };
    const auto plain = multiplied(plain_panels, round_row, true), exact = multiplied(plain_panels, round_row, false);
    const auto narrow = multiplied(bits == 4 ? rounded_panels<4> : rounded_panels<8>, round_row_avx2, true);
    const auto floats = multiplied(bits == 4 ? exact_panels<4> : exact_panels<8>, round_row_avx2, false);
    PanelFunction some = zeros ? (bits == 4 ? wide_panels<4, true> : wide_panels<8, true>)
                               : (bits == 4 ? wide_panels<4, false> : wide_panels<8, false>);
    const double wide = has_vnni() ? apart(multiplied(some, round_row_avx2, true), narrow) : -1;
    std::printf("{\"case\": \"%d bits, %d in, %d out, %d zeros, %d rows, %d bias\", \"avx2\": %g, \"exact\": %g, \"wide\": %g},\n",
                int(bits), int(in), int(outputs), zeros, int(rows), biased, apart(narrow, plain), apart(floats, exact), wide);
  }
  std::printf("null]\n");
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the program that runs every body, compiled with as few optimizations as Inductor asks for."""
    folder = tmp_path_factory.mktemp("panels")
    bodies = SOURCE.read_text(encoding="utf-8").partition('extern "C"')[0]
    (folder / "main.cpp").write_text(f"{bodies}\n{MAIN}")
    flags = ["-O1", "-std=c++17", "-march=x86-64-v3", f"-I{SOURCE.parent}"]
    subprocess.run(["g++", *flags, folder / "main.cpp", "-o", folder / "main"], check=True, capture_output=True)
    return folder / "main"


def test_every_body_gives_what_the_plain_one_gives(program: Path) -> None:
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    cases: list[dict[str, Any]] = json.loads(said)[:-1]
    assert len(cases) == 2 * 2 * 4 * 2 * 6 * 2
    assert [case for case in cases if not case["avx2"] < 1e-6] == []
    assert [case for case in cases if case["exact"] != 0] == []
    if cases[0]["wide"] == -1:
        pytest.skip("this processor has no AVX512-VNNI")
    assert [case for case in cases if case["wide"] != 0] == [], "the same integers, and the same sums in the same order"


def test_wide_vectors_stay_in_the_bodies_that_are_asked_for(program: Path) -> None:
    listing = subprocess.run(["objdump", "-dC", program], check=True, capture_output=True, text=True).stdout
    functions = re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)+)", listing, flags=re.MULTILINE)
    wide = {name for name, code in functions if "zmm" in code}
    assert wide
    assert [name for name in wide if not re.search(r"\bwide_(rows|panels)<", name)] == []
