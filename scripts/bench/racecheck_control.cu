// What racecheck says of two teams of threads that are known to wait for each other: see results/matmul_h100.md.
//
//     nvcc -O3 -arch=sm_90a -o control racecheck_control.cu && compute-sanitizer --tool racecheck ./control
//
// and again with -DTWICE, which writes the barrier between the teams twice: one is enough for the hardware, not for the tool.

#include <cstdio>

constexpr int TEAM = 128, NUMBERS = 64, STAGE = TEAM * NUMBERS;

// Each team passes numbers around among itself, behind a barrier of its own; then the second hands its sums to the first.
__global__ void two_teams(float* y, int turns) {
  extern __shared__ float shared[];
  int team = threadIdx.x / TEAM, mine = threadIdx.x % TEAM;
  float total[NUMBERS];
  for (int e = 0; e < NUMBERS; e++) total[e] = threadIdx.x * NUMBERS + e;
  float* own = shared + team * STAGE;
  for (int i = 0; i < turns; i++) {
    own[mine] = total[i & (NUMBERS - 1)];
    asm volatile("barrier.sync.aligned %0, 128;" :: "r"(team + 1) : "memory");
    for (int e = 0; e < NUMBERS; e++) total[e] += own[(mine + e) & (TEAM - 1)];
    asm volatile("barrier.sync.aligned %0, 128;" :: "r"(team + 1) : "memory");
  }
  if (team) {
    asm volatile("barrier.sync.aligned 2, 128;" ::: "memory");
    for (int e = 0; e < NUMBERS; e++) own[mine + e * TEAM] = total[e];
  }
  __syncthreads();
#ifdef TWICE
  __syncthreads();
#endif
  if (!team) for (int e = 0; e < NUMBERS; e++) total[e] += shared[STAGE + mine + e * TEAM];
  if (!team) for (int e = 0; e < NUMBERS; e++) y[(blockIdx.x * NUMBERS + e) * TEAM + mine] = total[e];
}

int main() {
  const int blocks = 64, bytes = 2 * STAGE * sizeof(float);
  float* y;
  cudaMalloc(&y, blocks * STAGE * sizeof(float));
  cudaFuncSetAttribute(two_teams, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  for (int i = 0; i < 10; i++) two_teams<<<blocks, 2 * TEAM, bytes>>>(y, 8);
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
