// What every kernel's library tells its caller besides `launch`.
#pragma once

// The graph that the stream is being captured into, 0 if none.
extern "C" unsigned long long capture(void* stream) {
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  cudaStreamGetCaptureInfo((cudaStream_t)stream, &status, &id);
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

extern "C" const char* describe(int error) { return cudaGetErrorString((cudaError_t)error); }
