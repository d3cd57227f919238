#pragma once
#include "emu.h"
namespace fastkernels{
template<class T> double el(uint32_t v,int i){uint16_t b=i?v>>16:v;T t;memcpy(&t,&b,2);return (double)(float)t;}
template<class T> void mma_m16n8k16(float(&c)[4],const uint32_t(&a)[4],uint32_t b0,uint32_t b1){
 auto*w=emu::me.warp;int l=emu::me.thread%32,g=l/4,t=l%4; w->b[l][0]=b0;w->b[l][1]=b1; for(int i=0;i<4;++i)w->a[l][i]=a[i]; w->all.arrive_and_wait();
 for(int e=0;e<4;++e){int row=g+e/2*8,col=2*t+e%2;double s=c[e];for(int k=0;k<16;++k){int tt=k%8/2;double av=el<T>(w->a[(row%8)*4+tt][row/8+k/8*2],k%2),bv=el<T>(w->b[col*4+tt][k/8],k%2);s+=av*bv;}c[e]=(float)s;} w->all.arrive_and_wait();}}
