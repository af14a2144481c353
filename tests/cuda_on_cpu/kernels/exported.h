// Exports of the test kernels for Python: plain functions that return an error's message, or null.
#pragma once

#include <exception>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default"))) const char*

template <typename Run>
const char* message_of(Run run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
