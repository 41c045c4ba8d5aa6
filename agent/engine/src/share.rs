//! How the prompts in progress share the room of a step. Arithmetic alone.

/// Tokens of each prompt that ride in a step with room for `room`, where `due[i]` are left of prompt i: the same for
/// all, except that what a short one leaves goes to the others. What can't be split goes to the first ones; a caller
/// who puts those first that waited longest starves nobody.
pub(crate) fn share(room: usize, due: &[usize]) -> Vec<usize> {
    let mut shares = vec![0; due.len()];
    let mut left = room.min(due.iter().sum());
    while left > 0 {
        let unmet = (0..due.len()).filter(|&i| shares[i] < due[i]);
        let unmet: Vec<usize> = unmet.collect();
        let each = (left / unmet.len()).max(1);
        for i in unmet {
            let more = each.min(due[i] - shares[i]).min(left);
            shares[i] += more;
            left -= more;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_alike_and_leave_no_room_unused() {
        assert!(share(128, &[]).is_empty());
        assert_eq!(share(128, &[30]), [30]);
        assert_eq!(share(128, &[1000, 1000]), [64, 64]);
        assert_eq!(share(128, &[1000, 8, 1000]), [60, 8, 60]);
        assert_eq!(share(128, &[10, 20, 30]), [10, 20, 30]);
        assert_eq!(share(10, &[9, 9, 9]), [4, 3, 3]);
        assert_eq!(share(2, &[9, 9, 9]), [1, 1, 0]);
        assert_eq!(share(0, &[9, 9]), [0, 0]);
    }

    #[test]
    fn any_shares_fill_the_room_and_differ_only_by_need() {
        for seed in 0..500_usize {
            let due: Vec<usize> = (0..seed % 7)
                .map(|i| (seed * 37 + i * i * 53) % 97 + 1)
                .collect();
            let room = seed % 130;
            let shares = share(room, &due);
            assert_eq!(shares.iter().sum::<usize>(), room.min(due.iter().sum()));
            let most = shares.iter().max().copied().unwrap_or(0);
            for (share, due) in shares.iter().zip(&due) {
                assert!(share <= due && (share == due || share + 1 >= most));
            }
        }
    }
}
