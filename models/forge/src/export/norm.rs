//! Norms and the residual sum in front of them, which some exporters write as one operator.

use super::decoder::Decoder;
use super::form::{Architecture, Norm};
use super::model::seeded;
use crate::llama::Part;
use crate::onnx::{float, int, ints};
use anyhow::Result;
use tract_onnx::pb::tensor_proto::DataType;

/// Which vector a norm multiplies with.
#[derive(Debug, Clone, Copy)]
pub(super) enum Gamma {
    Of(Part),
    /// Seeded, by the norm's name: what the model doesn't have.
    Seeded,
}

impl Decoder<'_> {
    /// Adds what a block computed to the state `x` and norms the sum; both are returned, the norm first. The sum
    /// stands in the module `outer`.
    pub(super) fn add_norm(
        &mut self,
        [outer, scope]: [&str; 2],
        gamma: Gamma,
        x: &str,
        block: Option<&str>,
    ) -> Result<[String; 2]> {
        if self.form.norm == Norm::Simplified
            && let Some(block) = block
        {
            return self.skip_norm(scope, gamma, x, block);
        }
        let sum = match block {
            Some(block) => self.tape.op(outer, "Add", &[x, block]),
            None => x.to_owned(),
        };
        Ok([self.norm(scope, gamma, &sum)?, sum])
    }

    /// The norm of `x` over its last axis.
    pub(super) fn norm(&mut self, scope: &str, gamma: Gamma, x: &str) -> Result<String> {
        let weight = self.gamma(scope, gamma)?;
        let epsilon = self.shape().epsilon;
        if self.form.architecture == Architecture::Phi {
            let (beta, width) = (bias_of(&weight), self.shape().width);
            self.tape
                .weight(&beta, &[width], || Ok(seeded(&beta, width, 0.0, 0.1)))?;
            let attributes = vec![int("axis", -1), float("epsilon", epsilon)];
            let operator = "LayerNormalization";
            return Ok(self
                .tape
                .op_with(scope, operator, &[x, &weight, &beta], attributes));
        }
        let attributes = || vec![int("axis", -1), float("epsilon", epsilon)];
        Ok(match self.form.norm {
            Norm::Primitive => self.primitive_norm(scope, x, &weight),
            Norm::Standard => {
                self.tape
                    .op_with(scope, "RMSNormalization", &[x, &weight], attributes())
            }
            Norm::Simplified => {
                let mut attributes = attributes();
                attributes.push(int("stash_type", 1));
                let operator = "SimplifiedLayerNormalization";
                self.tape
                    .op_with(scope, operator, &[x, &weight], attributes)
            }
        })
    }

    fn gamma(&mut self, scope: &str, gamma: Gamma) -> Result<String> {
        let name = scope.trim_start_matches('/').replace('/', ".") + ".weight";
        let (model, width) = (self.model, self.shape().width);
        let gemma = self.form.architecture == Architecture::Gemma;
        self.tape.weight(&name, &[width], || match gamma {
            Gamma::Of(part) => {
                let mut values = model.values(part)?;
                if gemma {
                    // The graph adds it back.
                    for value in &mut values {
                        *value -= 1.0;
                    }
                }
                Ok(values)
            }
            Gamma::Seeded => Ok(seeded(&name, width, 0.0, 0.1)),
        })?;
        Ok(name)
    }

    fn primitive_norm(&mut self, scope: &str, x: &str, weight: &str) -> String {
        let island = self.form.has_islands();
        let opset = self.form.opset;
        let tape = &mut self.tape;
        let float = if island { DataType::Float } else { tape.float };
        let x = if island {
            tape.cast(scope, x, float)
        } else {
            x.to_owned()
        };
        let two = tape.number_as(scope, 2.0, float);
        let squares = tape.op(scope, "Pow", &[&x, &two]);
        // The axes became an input with opset 18.
        let mean = if opset < 18 {
            tape.op_with(scope, "ReduceMean", &[&squares], vec![ints("axes", &[-1])])
        } else {
            let axes = tape.ints(scope, &[-1]);
            tape.op(scope, "ReduceMean", &[&squares, &axes])
        };
        let epsilon = tape.number_as(scope, self.model.shape.epsilon, float);
        let sum = tape.op(scope, "Add", &[&mean, &epsilon]);
        let root = tape.op(scope, "Sqrt", &[&sum]);
        let one = tape.number_as(scope, 1.0, float);
        let inverse = tape.op(scope, "Div", &[&one, &root]);
        let mut out = tape.op(scope, "Mul", &[&x, &inverse]);
        if island {
            out = tape.cast(scope, &out, tape.float);
        }
        if self.form.architecture == Architecture::Gemma {
            let one = tape.number(scope, 1.0);
            let weight = tape.op(scope, "Add", &[weight, &one]);
            return tape.op(scope, "Mul", &[&out, &weight]);
        }
        tape.op(scope, "Mul", &[weight, &out])
    }

    fn skip_norm(
        &mut self,
        scope: &str,
        gamma: Gamma,
        x: &str,
        block: &str,
    ) -> Result<[String; 2]> {
        let weight = self.gamma(scope, gamma)?;
        let tape = &mut self.tape;
        let name = format!("{scope}/SkipLayerNorm");
        let (normed, sum) = (tape.output(&name, 0), tape.output(&name, 3));
        tape.op_into(
            scope,
            "com.microsoft.SkipSimplifiedLayerNormalization",
            &[x, block, &weight],
            vec![float("epsilon", self.model.shape.epsilon)],
            &[&normed, "", "", &sum],
        );
        Ok([normed, sum])
    }
}

fn bias_of(weight: &str) -> String {
    weight.replace(".weight", ".bias")
}
