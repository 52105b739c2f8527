// Runs an artifact of AOTInductor with libtorch alone: greedy tokens after a prompt, past keys and values carried from call to call.
//
//   run FOLDER LAYERS KV_HEADS HEAD_DIM STEPS ID [ID …]      prints STEPS tokens, one a line
//
// FOLDER holds model.pt2, or prefill.pt2 and decode.pt2, and model.safetensors. Inputs are in the manifest's order: input_ids,
// attention_mask, position_ids (where the model has them), then key and value of each layer. Weights are mapped, and both packages read them.
// A token beyond the vocabulary ends the process: the package sees it in a thread of OpenMP, which cannot throw. Check what comes from outside.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace fs = std::filesystem;
using Loader = torch::inductor::AOTIModelPackageLoader;
using Weights = std::unordered_map<std::string, at::Tensor>;

// The header of a safetensors file is JSON; this reads no more of JSON than such headers have.
struct Header {
  const std::string text;
  size_t at = 0;

  void space() {
    while (at < text.size() && std::string(" \n\t,:").find(text[at]) != std::string::npos) ++at;
  }
  std::string string() {
    std::string out;
    for (++at; text.at(at) != '"'; ++at) {
      if (text[at] == '\\') ++at;
      out += text.at(at);
    }
    ++at;
    return out;
  }
  std::vector<int64_t> numbers() {
    std::vector<int64_t> out;
    for (++at, space(); text.at(at) != ']'; space()) {
      size_t length;
      out.push_back(std::stoll(text.substr(at, 20), &length));
      at += length;
    }
    ++at;
    return out;
  }
  bool ends() {
    space();
    return text.at(at) == '}' ? (++at, true) : false;
  }
};

Weights mapped(const fs::path& file) {
  static const std::map<std::string, at::ScalarType> types = {{"F32", at::kFloat}, {"BF16", at::kBFloat16}, {"F16", at::kHalf},
                                                              {"I64", at::kLong},  {"I32", at::kInt},       {"I16", at::kShort},
                                                              {"I8", at::kChar},   {"U8", at::kByte},       {"BOOL", at::kBool}};
  const int64_t size = fs::file_size(file);
  std::ifstream in(file, std::ios::binary);
  uint64_t length = 0;
  in.read(reinterpret_cast<char*>(&length), 8);
  if (!in || 8 + static_cast<int64_t>(length) > size) throw std::runtime_error(file.string() + " is cut short");
  std::string text(length, ' ');
  in.read(text.data(), length);
  // Private: nothing that is written goes to the file; what is read is the system's one copy of its pages.
  at::Tensor pages = torch::from_file(file.string(), false, size, at::kByte);
  Weights weights;
  Header header{text};
  header.space();
  ++header.at;
  while (!header.ends()) {
    std::string name = header.string(), dtype;
    std::vector<int64_t> shape, offsets;
    header.space();
    ++header.at;
    while (!header.ends()) {
      std::string key = header.string();
      header.space();
      if (key == "shape") shape = header.numbers();
      else if (key == "data_offsets") offsets = header.numbers();
      else if (std::string value = header.string(); key == "dtype") dtype = value;
    }
    if (dtype.empty()) continue;  // __metadata__
    const int64_t start = 8 + length + offsets.at(0), end = 8 + length + offsets.at(1);
    if (end > size) throw std::runtime_error(file.string() + " is cut short");
    weights[name] = pages.slice(0, start, end).view(types.at(dtype)).reshape(shape);
  }
  return weights;
}

// A package runs only after it was given every weight it names: before that it would crash the process.
std::unique_ptr<Loader> opened(const fs::path& package, const Weights& all) {
  auto loader = std::make_unique<Loader>(package.string());
  Weights named;
  for (const std::string& name : loader->get_constant_fqns()) {
    const auto found = all.find(name);
    if (found == all.end()) throw std::runtime_error(package.string() + " wants a weight that the file has not: " + name);
    named.insert(*found);
  }
  loader->load_constants(named, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  return loader;
}

void generate(const fs::path& folder, int64_t layers, int64_t heads, int64_t size, int64_t steps, std::vector<int64_t> ids) {
  c10::InferenceMode inference;
  const Weights weights = mapped(folder / "model.safetensors");
  const bool split = fs::exists(folder / "decode.pt2");
  auto prefill = opened(folder / (split ? "prefill.pt2" : "model.pt2"), weights);
  auto decode = split ? opened(folder / "decode.pt2", weights) : nullptr;

  std::vector<at::Tensor> states(2 * layers, torch::zeros({1, heads, 0, size}));
  int64_t past = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t fresh = ids.size();
    std::vector<at::Tensor> inputs = {torch::tensor(ids).unsqueeze(0), torch::ones({1, past + fresh}, at::kLong),
                                      torch::arange(past, past + fresh).unsqueeze(0)};
    inputs.insert(inputs.end(), states.begin(), states.end());
    std::vector<at::Tensor> outputs = (split && fresh == 1 ? decode : prefill)->run(inputs);
    const int64_t token = outputs.at(0).index({0, -1}).argmax().item<int64_t>();
    states.assign(outputs.begin() + 1, outputs.end());
    past += fresh;
    ids = {token};
    std::cout << token << "\n";
  }
}

int64_t number(const char* text, int64_t least) {
  char* end;
  const int64_t value = std::strtoll(text, &end, 10);
  if (end == text || *end || value < least) throw std::invalid_argument(std::string("'") + text + "' is no number from " + std::to_string(least));
  return value;
}

int main(int count, char** given) {
  if (count < 7) {
    std::cerr << "usage: run FOLDER LAYERS KV_HEADS HEAD_DIM STEPS ID [ID …]\n";
    return 2;
  }
  try {
    std::vector<int64_t> numbers;
    for (int at = 2; at < count; ++at) numbers.push_back(number(given[at], at < 6 ? 1 : 0));
    generate(given[1], numbers[0], numbers[1], numbers[2], numbers[3], {numbers.begin() + 4, numbers.end()});
  } catch (const std::exception& error) {
    std::cerr << "run: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
