#pragma once
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <cmath>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <vector>
template<class A,class B> auto min(A a,B b){return a<b?a:b;} template<class A,class B> auto max(A a,B b){return a<b?b:a;}
namespace emu{
struct Warp{std::barrier<> all{32};uint32_t a[32][4],b[32][2];};
struct Cluster;
struct Block{char*shared;int bytes;int x,y,rank;Cluster*cluster;std::barrier<>*all;Warp warps[8];};
struct Cluster{int size;std::barrier<>*all;std::vector<Block*>blocks;};
struct Me{int thread;Block*block;Warp*warp;};
inline thread_local Me me; struct Copy{uint32_t d;const void*s;};
inline thread_local std::vector<Copy> open_group; inline thread_local std::deque<std::vector<Copy>> groups;
inline bool early=false; inline const char*w_low,*w_high,*x_low,*x_high;}
