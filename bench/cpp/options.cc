// SPDX-License-Identifier: Apache-2.0
// Reads the command line.
#include "options.h"

#include <sys/stat.h>

#include <algorithm>
#include <charconv>
#include <functional>
#include <map>
#include <sstream>

namespace flashcore::bench {

const char* const usage = R"(usage: flashcore_bench COMMAND [OPTIONS]

commands
  ladder     every kernel from a scalar one to the library's own, on one problem, beside one another; needs a GPU
  attention  one problem through the public interface
  sweep      a suite of problems: forward, small or decode
  peak       what this GPU's tensor cores and memory reach, or without a GPU the processor's registers and memory

the problem (ladder, attention)
  --shape B,H,S,D       batch, heads, sequence length, head dimension (default 1,8,512,64)
  --dtype fp16          fp16 or bf16; on the CPU also fp32
  --causal              a query sees the keys up to its own position
and of attention alone
  --heads-k N           fewer key heads than query heads; must divide them
  --seqlen-k N          another number of keys; the last query stands on the last key
  --varlen N,N,...      B sequences of these lengths, packed one after another; the longest is S
  --window LEFT,RIGHT   keys that a query sees to either side; "all" is no limit
  --scale X --softcap X
  --backend NAME        cpu, sm80 or sm90 (default: plan chooses); also of sweep and peak

of sweep
  --suite NAME          forward, small or decode

of ladder
  --only NAME           this rung alone (with the baseline's column empty)
  --check               run and check each rung once, without timing: for compute-sanitizer and ncu

measuring
  --rounds N            of which the median counts (default 5)
  --milliseconds X      of work a round (default 20; on the CPU 100)
  --rotate GIB          inputs and outputs that calls walk through (default 1; on the CPU 0.03)
  --seed N              of the inputs (default 1)
  --json FILE           writes the results there as well
  --commit TEXT         what FILE says as commit

Results go to standard output, progress to standard error. Exit status: 0; 1 where a result is wrong or a kernel fails;
2 where the command line cannot be followed, or a GPU is needed and there is none.
)";

namespace {

template <class Number>
Number number(const std::string& option, const std::string& text, Number least, Number most) {
  Number x{};
  auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), x);
  if (error != std::errc() || end != text.data() + text.size() || !(x >= least && x <= most)) {
    std::ostringstream expected;
    expected << option << ": got \"" << text << "\"; expected a number from " << least << " to " << most;
    throw UsageError(expected.str());
  }
  return x;
}

constexpr int64_t longest = 1 << 30;

bool is_folder(const std::string& path) {
  struct stat facts;
  return stat(path.c_str(), &facts) == 0 && S_ISDIR(facts.st_mode);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream in(text + ',');
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  return parts;
}

template <class Value>
Value chosen(const std::string& option, const std::string& text, const std::map<std::string, Value>& known) {
  if (auto const found = known.find(text); found != known.end()) return found->second;
  std::string names;
  for (auto const& [name, value] : known) names += (names.empty() ? "" : ", ") + name;
  throw UsageError(option + ": got \"" + text + "\"; expected one of " + names);
}

}  // namespace

Options parse(int argc, char** argv) {
  Options o;
  std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.empty()) throw UsageError("no command; expected ladder, attention, sweep or peak");
  if (arguments[0] == "--help" || arguments[0] == "-h" || arguments[0] == "help") {
    o.command = "help";
    return o;
  }
  o.command =
      chosen<std::string>("command", arguments[0],
                          {{"ladder", "ladder"}, {"attention", "attention"}, {"sweep", "sweep"}, {"peak", "peak"}});

  // An option's value, and the commands that take it: l(adder), a(ttention), s(weep), p(eak).
  struct Option {
    std::string commands;
    bool has_value;
    std::function<void(const std::string&)> read;
  };
  std::string const window_help = "--window: expected LEFT,RIGHT, numbers of keys or \"all\"";
  std::map<std::string, Option> const known = {
      {"--shape",
       {"la", true,
        [&](auto& text) {
          auto const parts = split(text);
          if (parts.size() != 4) throw UsageError("--shape: got \"" + text + "\"; expected B,H,S,D");
          o.problem.batch = number<int64_t>("--shape, B", parts[0], 1, 1 << 20);
          o.problem.heads = number<int64_t>("--shape, H", parts[1], 1, 1 << 20);
          o.problem.seqlen = number<int64_t>("--shape, S", parts[2], 1, longest);
          o.problem.head_dim = number<int64_t>("--shape, D", parts[3], 1, 256);
        }}},
      {"--dtype",
       {"la", true,
        [&](auto& text) {
          o.problem.dtype = chosen<DType>("--dtype", text, {{"fp16", float16}, {"bf16", bfloat16}, {"fp32", float32}});
        }}},
      {"--causal", {"la", false, [&](auto&) { o.problem.causal = true; }}},
      {"--heads-k",
       {"a", true, [&](auto& text) { o.problem.heads_k = number<int64_t>("--heads-k", text, 1, 1 << 20); }}},
      {"--seqlen-k",
       {"a", true, [&](auto& text) { o.problem.seqlen_k = number<int64_t>("--seqlen-k", text, 1, longest); }}},
      {"--varlen",
       {"a", true,
        [&](auto& text) {
          for (auto const& part : split(text)) {
            o.problem.varlen.push_back(number<int64_t>("--varlen", part, 0, longest));
          }
        }}},
      {"--window",
       {"a", true,
        [&](auto& text) {
          auto const parts = split(text);
          if (parts.size() != 2) throw UsageError(window_help + "; got \"" + text + "\"");
          auto const side = [](const std::string& part) -> std::optional<int64_t> {
            if (part == "all") return std::nullopt;
            return number<int64_t>("--window", part, 0, longest);
          };
          o.problem.window_left = side(parts[0]);
          o.problem.window_right = side(parts[1]);
        }}},
      {"--scale", {"a", true, [&](auto& text) { o.problem.scale = number<double>("--scale", text, -1e6, 1e6); }}},
      {"--softcap", {"a", true, [&](auto& text) { o.problem.softcap = number<double>("--softcap", text, 0, 1e6); }}},
      {"--backend",
       {"asp", true,
        [&](auto& text) {
          o.problem.backend = chosen<Backend>(
              "--backend", text, {{"cpu", Backend::cpu}, {"sm80", Backend::sm80}, {"sm90", Backend::sm90}});
        }}},
      {"--suite",
       {"s", true,
        [&](auto& text) {
          o.suite =
              chosen<std::string>("--suite", text, {{"forward", "forward"}, {"small", "small"}, {"decode", "decode"}});
        }}},
      {"--only", {"l", true, [&](auto& text) { o.only = text; }}},
      {"--check", {"l", false, [&](auto&) { o.check = true; }}},
      {"--rounds", {"las", true, [&](auto& text) { o.budget.rounds = number<int>("--rounds", text, 1, 1000); }}},
      {"--milliseconds",
       {"las", true, [&](auto& text) { o.budget.milliseconds = number<double>("--milliseconds", text, 0.001, 1e5); }}},
      {"--rotate", {"las", true, [&](auto& text) { o.rotate = number<double>("--rotate", text, 0, 1024) * 0x1p30; }}},
      {"--seed", {"las", true, [&](auto& text) { o.seed = number<uint64_t>("--seed", text, 0, 1ull << 40); }}},
      {"--json", {"lasp", true, [&](auto& text) { o.json = text; }}},
      {"--commit", {"lasp", true, [&](auto& text) { o.commit = text; }}},
  };
  o.budget.milliseconds = 0;  // the machine's default
  o.rotate = -1;
  for (size_t i = 1; i < arguments.size(); ++i) {
    std::string const& name = arguments[i];
    if (name == "--help" || name == "-h") {
      o.command = "help";
      return o;
    }
    auto const found = known.find(name);
    if (found == known.end()) throw UsageError("unknown option " + name);
    if (found->second.commands.find(o.command[0]) == std::string::npos) {
      throw UsageError(name + " is no option of " + o.command);
    }
    if (found->second.has_value && i + 1 == arguments.size()) throw UsageError(name + ": its value is missing");
    found->second.read(found->second.has_value ? arguments[++i] : name);
  }

  Case const& c = o.problem;
  if (o.command == "sweep" && o.suite.empty())
    throw UsageError("--suite is missing; expected forward, small or decode");
  if (o.command == "ladder" && c.dtype == float32) throw UsageError("--dtype: the ladder takes fp16 and bf16");
  if (!c.varlen.empty()) {
    if (c.seqlen_k != 0) throw UsageError("--seqlen-k does not go with --varlen");
    if (static_cast<int64_t>(c.varlen.size()) != c.batch || *std::ranges::max_element(c.varlen) != c.seqlen) {
      throw UsageError("--varlen: expected B lengths, the longest of them S, for --shape B,H,S,D");
    }
  }
  if (c.heads % c.kv_heads() != 0) throw UsageError("--heads-k: must divide the query heads of --shape");
  if (!o.json.empty()) {
    size_t const slash = o.json.rfind('/');
    std::string const folder = slash == std::string::npos ? "." : o.json.substr(0, slash + 1);
    if (!is_folder(folder)) throw UsageError("--json: there is no folder " + folder);
    if (is_folder(o.json)) throw UsageError("--json: " + o.json + " is a folder");
  }
  return o;
}

}  // namespace flashcore::bench
