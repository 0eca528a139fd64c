// SPDX-License-Identifier: Apache-2.0
// A JSON value that is built and then written. Numbers that JSON does not have (NaN, infinities) become null.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace flashcore::bench {

class Json {
 public:
  using Members = std::vector<std::pair<std::string, Json>>;

  Json(const char* text) : text_(quoted(text)) {}
  Json(const std::string& text) : text_(quoted(text)) {}
  Json(bool value) : text_(value ? "true" : "false") {}
  Json(std::integral auto value) : text_(std::to_string(value)) {}
  Json(double value) : text_("null") {
    if (!std::isfinite(value)) return;
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", value);
    text_ = digits;
  }

  static Json object(Members members = {}) { return Json(std::move(members), true); }
  static Json array(std::vector<Json> items = {}) {
    Members members;
    for (auto& item : items) members.emplace_back("", std::move(item));
    return Json(std::move(members), false);
  }

  void set(const std::string& key, Json value) { members_.emplace_back(key, std::move(value)); }
  void append(Json value) { members_.emplace_back("", std::move(value)); }

  // Python's json.dumps(indent=1).
  std::string dump(int depth = 0) const {
    if (!text_.empty()) return text_;
    std::string const ends = is_object_ ? "{}" : "[]", inner(depth + 1, ' ');
    if (members_.empty()) return ends;
    std::string out(1, ends[0]);
    for (size_t i = 0; i < members_.size(); ++i) {
      out += (i > 0 ? ",\n" : "\n") + inner;
      if (is_object_) out += quoted(members_[i].first) + ": ";
      out += members_[i].second.dump(depth + 1);
    }
    return out + "\n" + std::string(depth, ' ') + ends[1];
  }

 private:
  Json(Members members, bool is_object) : members_(std::move(members)), is_object_(is_object) {}

  static std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char const c : text) {
      if (c == '"' || c == '\\') out += '\\';
      if (static_cast<unsigned char>(c) < 0x20) {
        char escape[8];
        std::snprintf(escape, sizeof escape, "\\u%04x", c);
        out += escape;
      } else {
        out += c;
      }
    }
    return out + '"';
  }

  std::string text_;  // of a value that is neither object nor array
  Members members_;
  bool is_object_ = false;
};

}  // namespace flashcore::bench
