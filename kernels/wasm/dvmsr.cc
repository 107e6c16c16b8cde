// The functions of the WebAssembly program; web/engine.js calls them. README.md says how it is built.
//
// A call traps if memory runs out. The program cannot go on after that.

#include <cstdint>

#include "kernels/wasm/memory.h"
#include "kernels/wasm/network.h"

#define EXPORT(name) extern "C" __attribute__((export_name(#name)))

namespace {

float* parameters;
kernels::Network* network;
kernels::Picture* picture;

}  // namespace

// The place of this many parameters, for the network that is made next.
EXPORT(parameters) float* PlaceParameters(int32_t count) {
  return parameters = new float[count];
}

// Makes the network, once; see network.h for the order of the parameters.
EXPORT(make_network)
void MakeNetwork(int32_t scale, int32_t channels, int32_t rssbs, int32_t vimms_per_rssb,
                 int32_t inner_channels, int32_t states, int32_t rank, int32_t conv_width) {
  kernels::Parameters from(parameters);
  network = new kernels::Network(
      from, {scale, rssbs, vimms_per_rssb, {channels, inner_channels, states, rank, conv_width - 1}});
  delete[] parameters;
}

// Begins a picture in RSSBs from `first` to before `last`, and gives up the one before. Returns the
// most rows that a band may have.
EXPORT(start) int32_t Start(int32_t width, int32_t first, int32_t last) {
  delete picture;
  picture = new kernels::Picture(*network, width, first, last);
  return picture->band_rows();
}

// Where the rows of a band belong; see network.h for what they are.
EXPORT(received) float* Received() { return picture->received(); }

// Takes a band in, and returns the number of the picture's rows that are now finished.
EXPORT(push) int32_t Push(int32_t rows) { return picture->Push(rows); }

// The same after the last band, to be called once for each 3x3 convolution.
EXPORT(flush) int32_t Flush() { return picture->Flush(); }

// The rows that were finished by the last call.
EXPORT(finished) const float* Finished() { return picture->finished(); }
