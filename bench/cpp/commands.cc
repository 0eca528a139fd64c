// SPDX-License-Identifier: Apache-2.0
// What the commands share: result files, progress, tables.
#include "commands.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <fstream>

#include "flashcore/flashcore.h"

namespace flashcore::bench {

bool on_cpu(Backend backend) {
  return backend == Backend::cpu || (backend == Backend::automatic && cuda_device_count() == 0);
}

Json report(const char* kind, const Options& options, const Machine& machine) {
  char date[16] = "";
  std::time_t const now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  Json json = Json::object({{"kind", kind}, {"date", date}, {"commit", options.commit}});
  for (auto& [key, value] : machine.facts()) json.set(key, value);
  return json;
}

void write(const Options& options, const Json& report) {
  if (options.json.empty()) return;
  std::ofstream file(options.json);
  file << report.dump() << '\n';
  if (!file.flush()) throw RuntimeError("--json: " + options.json + " cannot be written");
}

void progress(const std::string& text) {
  if (isatty(STDERR_FILENO)) {
    std::fprintf(stderr, "\r\033[K%s", text.c_str());
  } else if (!text.empty()) {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
  std::fflush(stderr);
}

std::string table(const std::vector<std::vector<std::string>>& rows) {
  size_t columns = 0;
  for (auto const& row : rows) columns = std::max(columns, row.size());
  std::vector<size_t> widths(columns);
  for (auto const& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (auto const& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      std::string const space(widths[i] - row[i].size(), ' ');
      line += (i > 0 ? "  " : "") + (i == 0 || i + 1 == columns ? row[i] + space : space + row[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string format(const char* text, double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, text, value);
  return buffer;
}

}  // namespace flashcore::bench
