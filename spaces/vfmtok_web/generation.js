/** The decode loop, whatever runs the decode step. */

import { TorchGenerator } from "./mt19937.js";
import { applyGuidance, drawToken, guidanceScales } from "./sampling.js";

/**
 * Draw the image tokens of one image, and give each as soon as it is drawn.
 *
 * @param {(label: number) => {next: (token: number) => Promise<Float32Array>, release: () => void}} newSequence begins a
 *   sequence; `next` reads the token at its next position and gives the logits of the one that follows.
 * @param {object} sizes of the generator: `numClasses`, `conditionPositions`, `numTokens`.
 * @param {object} settings `label`, `seed`, `guidance` as in guidanceScales, and those of drawToken.
 */
export async function* generateTokens(newSequence, { numClasses, conditionPositions, numTokens }, settings) {
  const scales = guidanceScales(numTokens, settings.guidance);
  const guidedSteps = scales.findLastIndex((scale) => scale !== 1) + 1;
  const generator = new TorchGenerator(settings.seed);
  // The second sequence has the null class, which is one past the last.
  const labels = guidedSteps > 0 ? [settings.label, numClasses] : [settings.label];
  const sequences = labels.map(newSequence);
  try {
    let token = 0; // read where the condition is, and ignored there
    for (let position = 0; position < conditionPositions - 1; position++) {
      for (const sequence of sequences) await sequence.next(token);
    }
    for (let step = 0; step < numTokens; step++) {
      if (step === guidedSteps && sequences.length > 1) sequences.pop().release();
      const logits = [];
      for (const sequence of sequences) logits.push(await sequence.next(token));
      const guided = logits.length > 1 ? applyGuidance(...logits, scales[step]) : logits[0];
      token = drawToken(guided, settings, generator);
      yield token;
    }
  } finally {
    for (const sequence of sequences) sequence.release();
  }
}
